"""Where frozen weights come from: hub, files, ties, conversion, quantising, the tokenizer."""
