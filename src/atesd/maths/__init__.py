"""The method's formulas: tensors and numbers in, tensors and numbers out."""
