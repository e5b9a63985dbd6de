"""Other people's checkpoints of Stable Diffusion: their files, their networks, their tokenizer and their settings.

Read weights.py first (files of tensors), then layers.py, clip_text.py, unet.py and autoencoder.py (the networks),
clip_tokenizer.py, scheduler_config.py (schedule, times and sampler of a checkpoint), agreement.py (what contradicts
something else) and checkpoints.py (a folder; hub.py fetches one).
lora.py and textual_inversion.py read small files that change a checkpoint.
systems/stable_diffusion.py puts them together.
"""
