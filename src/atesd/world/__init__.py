"""The embedded task: problems, texts, model, pretraining, acceptance."""
