"""Floor II: networks, their layers and their optimiser.

Read module.py, layers.py, transformer.py, unet.py, optim.py and precision.py first.  The other files are parts of one
or two systems each:

    image_tower                             CLIP, GLIDE
    fourier, grey_levels                    VDM
    classifier                              classifier guidance
    image_classifier                        evaluation, and the perceptual loss of autoencoders
    autoencoder, adversary, kl, quantise    autoencoders
    decoding, gumbel                        DALL-E
    prior, embedding_codes                  DALL-E 2
    mmdit                                   the diffusion transformer

docs/glossary.md explains the terms.
"""
