"""Runs where people watch them: TensorBoard, Weights & Biases, Trackio. Offline unless the user asks otherwise."""
