"""Floor IV, language: `tokenizer` makes captions ids, `encoder` gives ids meaning, `clip` compares them to pictures."""
