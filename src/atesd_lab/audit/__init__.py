"""Before a long run: does the reward drift, and what does the budget afford? The audit and the null test."""
