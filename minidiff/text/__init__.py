"""Floor IV, language.

`tokenizer` turns captions into ids, `encoder` turns ids into states, and `clip` compares captions with images.
`span_corruption` and `t5` train an encoder on text alone.  docs/glossary.md explains the terms.
"""
