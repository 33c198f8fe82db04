"""Layers of normalizing flows: bijections, base distributions, conditioner networks, and ``Flow`` that joins them."""

from .bijections.actnorm import ActNorm as ActNorm
from .bijections.autoregressive import (
    Autoregressive as Autoregressive,
    InverseAutoregressive as InverseAutoregressive,
    MaskedAutoregressive as MaskedAutoregressive,
)
from .bijections.batch_norm import BatchNormFlow as BatchNormFlow
from .bijections.bijection import Bijection as Bijection
from .bijections.columns import Columns as Columns
from .bijections.compose import Compose as Compose
from .bijections.coupling import (
    AdditiveCoupling as AdditiveCoupling,
    AffineCoupling as AffineCoupling,
    Coupling as Coupling,
    MixtureLogisticCoupling as MixtureLogisticCoupling,
)
from .bijections.elementwise import Exp as Exp, Logit as Logit, Softplus as Softplus, Tanh as Tanh
from .bijections.glow_step import GlowStep as GlowStep, NormalizedLinear as NormalizedLinear
from .bijections.inverse import Inverse as Inverse
from .bijections.invertible_linear import (
    PARAMETRIZATIONS as PARAMETRIZATIONS,
    InvertibleConv1x1 as InvertibleConv1x1,
    InvertibleLinear as InvertibleLinear,
)
from .bijections.multiscale import MultiScale as MultiScale
from .bijections.permutation import Flatten as Flatten, Permutation as Permutation, Squeeze as Squeeze
from .bijections.planar import Planar as Planar, Radial as Radial
from .bijections.preprocess import (
    Interval as Interval,
    Rescale as Rescale,
    Scaling as Scaling,
    Standardize as Standardize,
)
from .densities.base import Base as Base, DiagonalNormal as DiagonalNormal, Mixture as Mixture, StandardNormal as StandardNormal
from .densities.dequantization import (
    Dequantize as Dequantize,
    UniformDequantization as UniformDequantization,
    VariationalDequantization as VariationalDequantization,
)
from .densities.distribution import FlowDistribution as FlowDistribution
from .densities.flow import Flow as Flow, bits_per_dim as bits_per_dim
from .densities.likelihood import (
    Bernoulli as Bernoulli,
    Categorical as Categorical,
    DiscretizedLogisticMixture as DiscretizedLogisticMixture,
    Gaussian as Gaussian,
    GaussianMixture as GaussianMixture,
    Likelihood as Likelihood,
)
from .densities.made_density import MADEDensity as MADEDensity
from .densities.posterior import (
    FlowPosterior as FlowPosterior,
    GaussianPosterior as GaussianPosterior,
    HierarchicalPosterior as HierarchicalPosterior,
    HierarchicalPrior as HierarchicalPrior,
    Posterior as Posterior,
)
from .densities.vae import VAE as VAE, Objective as Objective, VampPrior as VampPrior
from .networks.autoencoder import ConvDecoder as ConvDecoder, ConvEncoder as ConvEncoder
from .networks.conditioner import (
    ACTIVATIONS as ACTIVATIONS,
    MLP as MLP,
    ConvNet as ConvNet,
    Parallel as Parallel,
    ResNet as ResNet,
)
from .networks.made import MADE as MADE, MaskedLinear as MaskedLinear
from .networks.masked_conv import GatedMaskedConv as GatedMaskedConv
from .quantizers.quantizer import CodeUsage as CodeUsage, Quantizer as Quantizer
from .quantizers.residual import ResidualVectorQuantizer as ResidualVectorQuantizer
from .quantizers.vector import VectorQuantizer as VectorQuantizer
from .transformers.affine import Additive as Additive, Affine as Affine, GatedAffine as GatedAffine
from .transformers.mixture_logistic import MixtureLogistic as MixtureLogistic
from .transformers.spline import RationalQuadraticSpline as RationalQuadraticSpline
from .transformers.transformer import Transformer as Transformer

#: The transformers and the quantizers by their names, which a class is declared with.
TRANSFORMERS, QUANTIZERS = Transformer.kinds, Quantizer.kinds
