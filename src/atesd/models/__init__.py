"""Language models through their public surface: load, prompt, sample, score, teach."""
