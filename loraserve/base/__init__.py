"""The frozen base: configuration, model, checkpoint formats, tokenizer, chat template."""
