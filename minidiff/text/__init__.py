"""Floor IV, language: `tokenizer` turns captions into ids, `encoder` gives ids meaning."""
