"""Problems, their segmented references, what the teacher reads of them, and whether an answer is right."""
