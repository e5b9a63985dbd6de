"""Other people's checkpoints of Stable Diffusion: their files, their networks, their tokenizer and their settings.

Read config.py, half.py and weights.py first (files of settings and tensors), then layers.py, agreement.py (what
contradicts something else), clip_text.py, unet.py and autoencoder.py (the networks), clip_tokenizer.py, spreads.py,
scheduler_classes.py and scheduler_config.py (schedule, times and sampler of a checkpoint), request.py (what it may be
asked for), single_file.py and checkpoints.py (a file, a folder; hub.py fetches one), and memory.py (whether there is
enough).
lora.py and textual_inversion.py read small files that change a checkpoint.
systems/stable_diffusion.py puts them together.
"""
