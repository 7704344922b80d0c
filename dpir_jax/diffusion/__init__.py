"""The mathematics of diffusion: paths and losses, time schedules, guidance, samplers. No network, no file."""
