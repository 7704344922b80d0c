"""Our networks beside PyTorch's (diffusers), in one process: same weights, inputs, threads, float32, on this CPU.

    python benchmarks/versus_torch.py [--only mmdit vae unet] [--rounds 5] [--threads N]

The two take turns, so that other work on the machine meets both alike; medians over the rounds. Wall seconds are what
one waits for; CPU seconds, of all threads, hardly change when the machine is busy. PyTorch runs eagerly, as pipelines
of diffusers do. The training step is loss, gradient and plain gradient descent (AdamW's moments of both sides together
would need 5 GB more), ours as with `config.unroll`. Compiling is not counted and shown beside. One more run of each,
under the profilers, says where the time goes. Needs the extra [test] and 9 GB of memory.
"""

import argparse
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import profiles

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both sides run where both can

AIM = 1.3  # times PyTorch's speed
LEARNING_RATE = 1e-4

PROFILE = """
Seconds of one run under the profilers, torch / ours, by kind of work. Last: the arithmetic of the plain form, and how
long all of it would take at the speed of NumPy's product of 2,048 x 2,048 matrices, measured right after: only what
multiplies less (Winograd) can go below that. What runs beside a product and ends before it counts as the product's.
Copies of MMDiT's are mostly the blocks' weights, out of their stack, and gradients, into it. What was tried:
docs/speed_notes.md.
"""


class Case(NamedTuple):
    """`theirs()` and `ours()` run once, to the end, and return what is compared (NCHW made NHWC)."""

    title: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    program: "Program"


class Program(NamedTuple):
    """What `ours` runs, the seconds that compiling it took, and the GFLOP of its plain form (no Winograd)."""

    run: Any
    compiling: float
    gflop: float


class Timing(NamedTuple):
    """Seconds of one run."""

    wall: float
    cpu: float


def random(seed: int, *shape: int) -> Any:
    """N(0, 1) in float32."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def to_torch(array: Any) -> Any:
    """A tensor; pictures (four dimensions) as NCHW."""
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array))


def to_nhwc(tensor: Any) -> Any:
    """A tensor as an array; NCHW becomes NHWC."""
    return tensor.detach().permute(0, 2, 3, 1).numpy() if tensor.ndim == 4 else tensor.detach().numpy()


def compiled(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    """The function for these arguments."""
    import jax

    from dpir_jax.models.platform import use_platform
    from dpir_jax.parallel.flops import count_flops

    begin = time.perf_counter()
    run = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    compiling = time.perf_counter() - begin
    with use_platform("gpu"):
        work = count_flops(jax.jit(lambda *arguments: function(*arguments)).trace(*arguments).jaxpr)
    return Program(run, compiling, work / 1e9)


def network(kind: type, config: Any, model: Any, rules: Any) -> Any:
    """Our network with the weights of theirs."""
    from flax import nnx

    from convert_weights.engine import load_into
    from dpir_jax.models.layers import Keys

    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return load_into(nnx.eval_shape(lambda: kind(config, rngs=Keys(0))), weights, rules)


# --- the cases -------------------------------------------------------------------------------------------------------


def mmdit() -> Iterator[Case]:
    """Four blocks of Stable Diffusion 3 medium's width on a 512 px picture and DPIR's prompt: 1,024 + 333 tokens."""
    import diffusers
    import jax
    import jax.numpy as jnp
    import torch

    from convert_weights import mmdit as table
    from dpir_jax.models.layers import use_unrolled_blocks
    from dpir_jax.models.mmdit import MMDiT, MMDiTConfig

    config = MMDiTConfig(num_layers=4)
    model = diffusers.SD3Transformer2DModel.from_config(table.published(config)).eval()
    net = network(MMDiT, config, model, table.rules(config))
    given = (random(0, 1, 64, 64, 16), jnp.float32([500.0]), random(1, 1, 333, 4096), random(2, 1, 2048))
    target = random(3, 1, 64, 64, 16)
    latent, context, pooled, wanted = (to_torch(x) for x in (given[0], given[2], given[3], target))
    timestep = torch.tensor([500.0])

    def theirs() -> Any:
        return model(latent, context, pooled, timestep, return_dict=False)[0]

    forward = compiled(lambda net, given: net(*given), net, given)

    def evaluate() -> Any:
        with torch.no_grad():
            return to_nhwc(theirs())

    yield Case("MMDiT, 4 blocks, 1,357 tokens: forward", evaluate, lambda: forward.run(net, given), forward)

    descent = torch.optim.SGD(model.train().parameters(), LEARNING_RATE)

    def their_step() -> Any:
        loss = torch.mean(torch.square(theirs() - wanted))
        loss.backward()
        descent.step()
        descent.zero_grad()  # at the end, so that the gradient takes no memory during our turn
        return to_nhwc(loss)

    def step(net: Any, given: Any, target: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda net: jnp.mean(jnp.square(net(*given) - target)))(net)
        return jax.tree.map(lambda weight, slope: weight - LEARNING_RATE * slope, net, gradient), loss

    with use_unrolled_blocks():
        descend = compiled(step, net, given, target, donate=(0,))
    state = net

    def our_step() -> Any:
        nonlocal state
        state, loss = descend.run(state, given, target)
        jax.block_until_ready(state)
        return loss

    yield Case("MMDiT, 4 blocks, 1,357 tokens: training step", their_step, our_step, descend)


def vae() -> Iterator[Case]:
    """Stable Diffusion 3's autoencoder: latent to 512x512 picture."""
    import diffusers
    import torch

    from convert_weights import autoencoder as table
    from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig

    config = AutoencoderConfig.sd3()
    model = diffusers.AutoencoderKL.from_config(table.published(config)).eval()
    net = network(Autoencoder, config, model, table.rules(config))
    latent = random(0, 1, 64, 64, 16)
    theirs, decode = to_torch(latent), compiled(lambda net, latent: net.decode(latent), net, latent)

    def evaluate() -> Any:
        with torch.no_grad():
            return to_nhwc(model.decode(theirs).sample)

    yield Case("SD 3 autoencoder: decode to 512x512", evaluate, lambda: decode.run(net, latent), decode)


def unet() -> Iterator[Case]:
    """Stable Diffusion 2's UNet: one step on a 64x64 latent with 77 text tokens."""
    import diffusers
    import jax.numpy as jnp
    import torch

    from convert_weights import unet as table
    from dpir_jax.models.unet import UNet, UNetConfig

    config = UNetConfig.sd2()
    blocks = {True: "CrossAttn", False: ""}
    model = diffusers.UNet2DConditionModel(
        block_out_channels=config.block_out_channels,
        down_block_types=[f"{blocks[on]}DownBlock2D" for on in config.attention],
        up_block_types=[f"{blocks[on]}UpBlock2D" for on in config.attention[::-1]],
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=True,
    ).eval()
    net = network(UNet, config, model, table.UNET_RULES)
    given = (random(0, 1, 64, 64, 4), jnp.float32([500.0]), random(1, 1, 77, config.context_dim))
    latent, context = to_torch(given[0]), to_torch(given[2])
    step = compiled(lambda net, given: net(*given), net, given)

    def evaluate() -> Any:
        with torch.no_grad():
            return to_nhwc(model(latent, torch.tensor([500.0]), context).sample)

    yield Case("SD 2 UNet: step at 64x64", evaluate, lambda: step.run(net, given), step)


CASES = {"mmdit": mmdit, "vae": vae, "unet": unet}


# --- measuring -------------------------------------------------------------------------------------------------------


def once(run: Callable[[], Any]) -> tuple[Any, Timing]:
    """One run, waited for."""
    import jax

    wall, cpu = time.perf_counter(), time.process_time()
    value = jax.block_until_ready(run())
    return value, Timing(time.perf_counter() - wall, time.process_time() - cpu)


def difference(case: Case) -> float:
    """The largest difference of the first results over the largest value."""
    import numpy as np

    (theirs, _), (ours, _) = once(case.theirs), once(case.ours)
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def measure(case: Case, rounds: int) -> tuple[str, str]:
    """A line of each table. One run of both beforehand."""
    apart = difference(case)
    theirs, ours = [], []
    for index in range(rounds):
        turns = [(case.theirs, theirs), (case.ours, ours)]
        for run, timings in turns[:: 1 if index % 2 else -1]:
            timings.append(once(run)[1])
    (their_wall, our_wall), (their_cpu, our_cpu) = (
        tuple(statistics.median(getattr(timing, kind) for timing in timings) for timings in (theirs, ours))
        for kind in ("wall", "cpu")
    )
    speed = (
        f"| {case.title} | {their_wall:.2f} | {our_wall:.2f} | **{their_wall / our_wall:.2f}** | {their_cpu:.2f} "
        f"| {our_cpu:.2f} | {their_cpu / our_cpu:.2f} | {case.program.compiling:.0f} | {apart:.0e} |"
    )
    found = profiles.of_torch(case.theirs), profiles.of_jax(case.ours, case.program.run.as_text())
    shares = (f"{theirs[kind]:.2f} / {ours[kind]:.2f}" for kind in profiles.KINDS for theirs, ours in (found,))
    bound = case.program.gflop / profiles.fastest_product()
    return speed, f"| {case.title} | {' | '.join(shares)} | {case.program.gflop:.0f} | {bound:.2f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--threads", type=int, help="CPU cores for both; default: all")
    arguments = parser.parse_args()
    if arguments.threads:  # both libraries size their pools by what they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about their own dependencies
        import diffusers
        import jax
        import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, jax {jax.__version__}, {cores} cores, "
          f"float32, medians of {arguments.rounds}, load average {os.getloadavg()[0]:.1f}. Aim: {AIM}.\n")  # fmt: skip
    print("| | torch s | ours s | **times as fast** | torch CPU s | ours CPU s | by CPU | compile s | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    shares = []
    for name in arguments.only:
        for case in CASES[name]():
            speed, share = measure(case, arguments.rounds)
            print(speed, flush=True)
            shares.append(share)
        gc.collect()
    print(PROFILE)
    print(f"| | {' | '.join(profiles.KINDS)} | GFLOP | at that rate, s |\n|---|{'---|' * (len(profiles.KINDS) + 2)}")
    print("\n".join(shares))
    print(f"\nLoad average at the end {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
