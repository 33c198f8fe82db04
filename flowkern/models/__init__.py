"""Models that know their configuration, by name, and their checkpoints."""

from ._autoregressive import IAF as IAF
from ._autoregressive import MAF as MAF
from ._budget import Budget as Budget
from ._dequantized import DequantizedFlow as DequantizedFlow
from ._glow import Glow as Glow
from ._made import MADE as MADE
from ._model import DiscreteModel as DiscreteModel
from ._model import FlowModel as FlowModel
from ._model import Model as Model
from ._model import Picture as Picture
from ._pixelcnn import PixelCNN as PixelCNN
from ._pixelvae import PixelVAE as PixelVAE
from ._realnvp import NICE as NICE
from ._realnvp import RealNVP as RealNVP
from ._registry import MODELS as MODELS
from ._registry import PRESETS as PRESETS
from ._registry import build as build
from ._registry import model as model
from ._vae import VAE as VAE
from ._vqvae import VQVAE as VQVAE
from ._vqvae import VQVAE2 as VQVAE2
from .checkpoint import load as load
from .checkpoint import read_checkpoint as read_checkpoint
from .checkpoint import save as save
from .checkpoint import write_atomically as write_atomically
