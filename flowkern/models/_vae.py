"""The variational autoencoder with its priors and posteriors by name."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import diagnostics, nn
from ..nn.densities.base import check_name, check_sizes
from ..nn.densities.likelihood import likelihood as named_likelihood, start
from ._autoregressive import IAF, MAF
from ._model import DiscreteModel, FlowModel, Picture, model_shape
from ._realnvp import NICE, RECIPE, RealNVP
from ._registry import model

FLOWS = ("nice", "realnvp", "maf", "iaf")
PRIORS = ("standard", "mixture", "vamp", *FLOWS)
POSTERIORS = ("gaussian", "planar", "radial", *FLOWS)
NETWORKS = ("mlp", "conv")


@model(
    "vae",
    presets={
        "digits": {"lr": 1e-3, "ema": 0.998, "epochs": 300},
        "digits-recipe": RECIPE,
        "photos": {
            "config": {"network": "conv", "hidden": [48, 96], "latent": 64, "components": 2},
            "batch_size": 32,
            "ema": 0.99,
            "epochs": 20,
        },
    },
)
class VAE(nn.VAE, DiscreteModel):
    """``nn.VAE`` over samples of one shape, and what it is made of by name.

    ``log_prob`` is the ELBO, of one draw of the latents.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        levels: how many values an element can have, for discrete likelihoods; None for continuous data.
        latent: L. With ``upper``, that of the lower of two layers: p(x | z_1) p(z_1 | z_2) p(z_2) with ``upper`` latents z_2.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"logistic"`` (a mixture of ``components`` discretized logistics),
            ``"gaussian"`` (learned variance) or ``"mixture"`` of ``components`` Gaussians; None for gaussian without ``levels``,
            else categorical, or logistic for more than 64. The continuous ones take images as dequantized.
        network: ``"mlp"``, to which images are vectors, or ``"conv"``: ``nn.ConvEncoder`` and ``nn.ConvDecoder`` of images. With
            the latter the channels of a pixel depend on one another under ``"logistic"``.
        hidden, activation, dropout: of the networks; ``hidden`` are the widths of the MLP's layers, or of the convolutions that
            halve height and width. Those of flows in the prior and the posterior are ``flow_hidden`` wide.
        blocks: residual blocks of a convolutional network.
        prior: ``"standard"`` normal, ``"mixture"`` of ``components`` Gaussians, ``"vamp"`` with ``components`` pseudo-inputs,
            or a flow of ``flow_layers``: ``"realnvp"``, ``"nice"``, ``"maf"`` (Chen et al. 2017) or ``"iaf"``.
        posterior: diagonal ``"gaussian"``, or followed by ``flow_layers`` layers, ``"planar"``, ``"radial"`` or those of a flow,
            which also see 2 L values from the encoder.
        objective: the fields of ``nn.Objective``.
        context: K of a context (B, K), which both networks see: a class, one-hot, for a class-conditional VAE.

    Raises ValueError for settings that do not fit, and unknown names.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        levels: int | None = None,
        latent: int = 16,
        upper: int | None = None,
        likelihood: str | None = None,
        components: int = 16,
        network: str = "mlp",
        hidden: Sequence[int] = (256, 256),
        blocks: int = 1,
        activation: str = "leaky_relu",
        dropout: float = 0.0,
        prior: str = "standard",
        posterior: str = "gaussian",
        flow_layers: int = 3,
        flow_hidden: Sequence[int] = (256, 256),
        objective: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        sizes, _ = model_shape(shape, flatten=True)
        if levels is not None and levels < 2:
            raise ValueError(f"levels: expected at least 2, got {levels}")
        likelihood = likelihood or ("gaussian" if levels is None else "categorical" if levels <= 64 else "logistic")
        output = named_likelihood(likelihood, components, levels or 2)
        if output.discrete and levels is None:
            raise ValueError(f"likelihood: {likelihood!r} is for discrete values; expected levels")
        if output.discrete and output.levels != levels:
            raise ValueError(f"likelihood: {likelihood!r} is for {output.levels} levels, got {levels}")
        check_sizes(latent=latent, upper=upper, components=components, flow_layers=flow_layers, context=context)
        check_sizes(0, blocks=blocks)
        check_name("network", network, NETWORKS)
        if network == "conv" and len(sizes) != 3:
            raise ValueError(f"network: 'conv' is for images (C, H, W), got shape {sizes}")
        check_name("posterior", posterior, POSTERIORS)
        check_name("prior", prior, PRIORS)
        if not isinstance(objective or {}, Mapping):
            raise ValueError(f"objective: expected the fields of nn.Objective, got {objective!r}")
        if upper is not None and (prior, posterior) != ("standard", "gaussian"):
            raise ValueError(f"upper: two layers have a standard prior and a gaussian posterior, got {prior!r} and {posterior!r}")
        if prior == "vamp" and context is not None:
            raise ValueError("prior: 'vamp' has no context to show to the encoder with its pseudo-inputs")
        features = math.prod(sizes)
        widths, flow_widths = tuple(hidden), tuple(flow_hidden)
        options: dict[str, Any] = {"activation": activation, "zero_init": False}
        if upper is None:
            approximate = _posterior(posterior, latent, flow_layers, flow_widths)
        else:
            approximate = nn.HierarchicalPosterior(latent, upper, nn.MLP(latent, 2 * upper, widths, **options))
        how: dict[str, Any] = {"context": context, "activation": activation, "dropout": dropout}
        convolutions = blocks if network == "conv" else None
        new_decoder = functools.partial(self._new_decoder, sizes, latent, output, widths, convolutions, **how)
        # What is drawn first stays first.
        if network == "conv":
            encoder: torch.nn.Module = nn.ConvEncoder(sizes, approximate.inputs, widths, blocks, **how)
            decoder = new_decoder()
        else:
            decoder = new_decoder()
            encoder = nn.MLP(features, approximate.inputs, widths, **how, zero_init=False)
        if upper is None:
            priors: dict[str, Callable[[], torch.nn.Module]] = {
                "standard": lambda: nn.StandardNormal(latent),
                "mixture": lambda: nn.Mixture(latent, components),
                "vamp": lambda: nn.VampPrior(encoder, approximate, 0.5 * torch.randn(components, features)),
            }
            known = priors[prior]() if prior in priors else _flow(prior, latent, flow_layers, flow_widths)
        else:
            known = nn.HierarchicalPrior(latent, upper, nn.MLP(upper, 2 * latent, widths, **options))
        super().__init__(encoder, decoder, output, known, approximate)
        self.shape, self.context, self.discrete, self.stochastic = sizes, context, output.discrete, True
        self.levels, self.latent = levels or 0, latent
        self.training_objective = nn.Objective(**(objective or {}))
        self.settle(likelihood=likelihood, objective=dataclasses.asdict(self.training_objective))

    def _new_decoder(
        self,
        shape: tuple[int, ...],
        latent: int,
        likelihood: nn.Likelihood,
        hidden: tuple[int, ...],
        blocks: int | None,
        **options: Any,
    ) -> torch.nn.Module:
        """A network to the likelihood's parameters: convolutions if there is a number of residual ``blocks``."""
        if blocks is not None:
            images = nn.ConvDecoder(latent, shape, likelihood.maps(shape[0]), hidden[::-1], blocks, **options)
            start(images.network[-1], likelihood.bias(shape[0]))  # type: ignore[arg-type]
            return images
        vectors = nn.MLP(latent, math.prod(shape) * likelihood.params, hidden, **options, zero_init=False)
        start(vectors.layers[-1], likelihood.bias())  # type: ignore[arg-type]
        return vectors

    forward = DiscreteModel.forward

    @classmethod
    def config_for(cls, levels: int | None) -> dict[str, Any]:
        return {"levels": levels}

    def decode(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        if z.ndim != 2 or z.shape[1] != self.posterior.features:
            raise ValueError(f"z: expected shape (B, {self.posterior.features}), got {tuple(z.shape)}")
        return super().decode(z[:, : self.latent], context)

    def _data(self, x: torch.Tensor) -> torch.Tensor:
        """What ``nn.VAE`` is about: the integers of dequantized x if they are discrete, else x."""
        return self.values(x) if self.discrete else x

    @property
    def _log_volume(self) -> float:
        """log of how many cells of integers the density of dequantized x counts as one: D log levels, or 0."""
        return math.prod(self.shape) * math.log(self.levels) if self.discrete else 0.0

    def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """A lower bound on log P(v), the ELBO: (B,) in nats."""
        return self.elbo(v, context)

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """A lower bound on log p(x), the ELBO of one draw, of dequantized x if the data is discrete: (B,) in nats."""
        if self.discrete:
            return super().log_prob(x, context)
        self.check_shape(x)
        return self.elbo(x, context)

    def log_weight(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x|z) + log p(z) - log q(z|x) of one draw, of dequantized x if the data is discrete: (B,) in nats."""
        self.check_shape(x)
        return self.evidence(self._data(x), context).log_weight[0] + self._log_volume

    def objective(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """What ``nn.VAE.loss`` says of the objective after so many ``steps``, for dequantized x if the data is discrete.

        Who trains sets ``steps``, as ``flowkern train`` does; else the calls are counted, while the rate warms up.
        """
        self.check_shape(x)
        step = None
        if self.training_objective.warmup:
            step, self.steps = self.steps, self.steps + 1
        return self.loss(self._data(x), self.training_objective, context, step) - self._log_volume

    def embed(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The posterior's point z (B, L) for dequantized x."""
        self.check_shape(x)
        return self.posterior.mean(self.encode(self._data(x), context))

    def render(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The likelihood's mean (B, *shape), as dequantized data."""
        mean = self.mean(z, context).view(-1, *self.shape)
        return (mean + 0.5) / self.levels if self.discrete else mean

    def pictures(
        self, x: torch.Tensor, other: torch.Tensor, context: torch.Tensor | None, contexts: torch.Tensor | None
    ) -> Iterator[Picture]:
        """Means of the decoder for latents of the prior, an image with one latent after the other moved, and analogies.

        The latents that differ most between the images come first. Of two layers the lower one is moved, all the decoder sees.
        """
        n, dtype = len(x), next(self.parameters()).dtype
        means = self.render(self.prior.sample(n**2).to(dtype), contexts)
        yield Picture("means.png", means, "means of p(x | z), for samples z of the prior")
        z, z_other = self.embed(x, context), self.embed(other, context)
        first = None if context is None else context[:1].repeat_interleave(n, 0)
        widest = z[:, : self.latent].var(0).argsort(descending=True)[:n].tolist()
        moved = [self.render(diagnostics.traverse(z[:1], dimension)[0], first) for dimension in widest]
        yield Picture("traversals.png", torch.cat(moved), "an image with one latent in each row moved from -3 to 3")
        following = None if context is None else context.roll(-1, 0)
        fourth = self.render(diagnostics.analogy(z, z_other, z.roll(-1, 0)), following)
        rows = torch.cat([x, other, x.roll(-1, 0), fourth])
        yield Picture("analogies.png", rows, "a, b, c and what is to c as b is to a, one below the other,")

    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        return nn.VAE.sample(self, n, context, temperature).long().view(n, *self.shape)

    @torch.no_grad()
    def sample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples (n, *shape), dequantized by the middle of the cells if they are discrete."""
        if self.discrete:
            return DiscreteModel.sample(self, n, context, temperature)
        return nn.VAE.sample(self, n, context, temperature).view(n, *self.shape)


def _flow(name: str, features: int, layers: int, hidden: tuple[int, ...], context: int | None = None) -> FlowModel:
    if not hidden:
        raise ValueError(f"flow_hidden: {name!r} needs at least one width, got none")
    if name in ("maf", "iaf"):
        return (MAF if name == "maf" else IAF)(features, layers=layers, hidden=hidden, context=context)
    if features < 2:
        raise ValueError(f"latent: {name!r} couples one part of the latents with the other, and there is {features}")
    coupled: Any = NICE if name == "nice" else RealNVP
    return coupled(features, couplings=layers, hidden=hidden[0], depth=len(hidden), context=context)


def _posterior(name: str, latent: int, layers: int, hidden: tuple[int, ...]) -> nn.Posterior:
    if name == "gaussian":
        return nn.GaussianPosterior(latent)
    context = 2 * latent
    if name in FLOWS:
        return nn.FlowPosterior(latent, _flow(name, latent, layers, hidden, context).bijection, context)
    steps = [{"planar": nn.Planar, "radial": nn.Radial}[name](latent, context) for _ in range(layers)]
    return nn.FlowPosterior(latent, nn.Compose(*steps), context)
