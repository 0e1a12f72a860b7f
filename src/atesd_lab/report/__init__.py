"""Read run folders; write tables, figures and one self-contained page. Never imports torch."""
