"""The mathematics of diffusion, on plain arrays: no network, no gradient, no text.

Each file imports only from those before it. In reading order:

    schedules.py    alpha_bar: how much of the image is left at each time
    gaussian.py     q(x_t | x_0) and its posterior; eps, x_0, v and the score as four forms of one prediction
    denoiser.py     the contract x0_hat = denoiser(x_t, t, cond)
    exact.py        data for which the best denoiser is known in closed form
    losses.py       how much an error at time t counts
    times.py        the times of a training batch
    densities.py    how often each noise level is drawn, over log-SNR
    samplers.py     from noise to an image: DDPM, DDIM, Heun, DPM-Solver++
    multistep.py    more samplers, by which Stable Diffusion is usually drawn
    consistency.py  from noise to an image in a few calls of a network that was trained for that
    guidance.py     a denoiser that follows its condition more closely
    rectified_flow.py  the straight path from image to noise, its velocity, and the times at which it is learned
    likelihood.py   how many bits an image costs: the variational bound, and the density of the flow
    variational.py  the bound in continuous time, the same along every path of noise levels
    entropy.py      the bound of the first diffusion paper, in entropies
    posterior.py    sampling from p(x_0) r(x_0) with a model of p: in-painting, de-noising
    editing.py      image to image, and in-painting by replacement
    cascade.py      a small image, then larger ones that add its detail
"""
