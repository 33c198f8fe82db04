"""Models that know their configuration, by name, and their checkpoints."""

from ._autoregressive import IAF as IAF, MAF as MAF
from ._budget import Budget as Budget
from ._dequantized import DequantizedFlow as DequantizedFlow
from ._glow import Glow as Glow
from ._made import MADE as MADE
from ._model import DiscreteModel as DiscreteModel, FlowModel as FlowModel, Model as Model, Picture as Picture
from ._nsf import NSF as NSF
from ._pixelcnn import PixelCNN as PixelCNN
from ._pixelvae import PixelVAE as PixelVAE
from ._realnvp import NICE as NICE, RealNVP as RealNVP
from ._registry import MODELS as MODELS, PRESETS as PRESETS, build as build, model as model
from ._vae import VAE as VAE
from ._vqvae import VQVAE as VQVAE, VQVAE2 as VQVAE2
from .checkpoint import load as load, read_checkpoint as read_checkpoint, save as save, write_atomically as write_atomically
