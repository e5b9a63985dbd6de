"""The mathematics of diffusion, on plain arrays: no network, no gradient, no text.

Read in this order:

    schedules.py    alpha_bar: how fast an image drowns in noise
    gaussian.py     q(x_t | x_0) and its posterior; eps, x_0, v and score are four names of one thing
    denoiser.py     the contract x0_hat = denoiser(x_t, t, cond), and data whose best denoiser is known
    losses.py       what an error at time t is worth
    samplers.py     from noise to image: DDPM, DDIM, Heun, DPM-Solver++
    guidance.py     a denoiser that listens harder to its condition
    likelihood.py   how many bits an image costs: the variational bound, and the flow's own density
    entropy.py      the first diffusion paper's bound, in entropies, and what they say of a reverse step
    posterior.py    a model of p(x_0) draws from p(x_0) r(x_0): in-painting, de-noising
    cascade.py      a small image, then larger ones that fill in its detail
"""
