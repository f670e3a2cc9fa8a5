# The list of passes, one line each: what type checkers read, and what passes/__init__.py makes its table of.
# A pass's file is named as the pass is spelled.

from tokopt.passes.cleanup.drop_unread import DropUnread as DropUnread
from tokopt.passes.cleanup.fold_scales import FoldScales as FoldScales
from tokopt.passes.exit.adapter import Adapter as Adapter
from tokopt.passes.exit.drop_blocks import DropBlocks as DropBlocks
from tokopt.passes.exit.exit import Exit as Exit
from tokopt.passes.exit.skipdecode import SkipDecode as SkipDecode
from tokopt.passes.exit.split import Split as Split
from tokopt.passes.kv.adakv import AdaKV as AdaKV
from tokopt.passes.kv.chunk import Chunk as Chunk
from tokopt.passes.kv.expected_attention import ExpectedAttention as ExpectedAttention
from tokopt.passes.kv.h2o import H2O as H2O
from tokopt.passes.kv.int8_kv import Int8KV as Int8KV
from tokopt.passes.kv.keydiff import KeyDiff as KeyDiff
from tokopt.passes.kv.keyformer import Keyformer as Keyformer
from tokopt.passes.kv.kivi import KIVI as KIVI
from tokopt.passes.kv.knorm import KNorm as KNorm
from tokopt.passes.kv.random_kv import RandomEviction as RandomEviction
from tokopt.passes.kv.snapkv import SnapKV as SnapKV
from tokopt.passes.kv.streaming import Streaming as Streaming
from tokopt.passes.kv.tova import TOVA as TOVA
from tokopt.passes.quantize.awq import AWQ as AWQ
from tokopt.passes.quantize.cast import Cast as Cast
from tokopt.passes.quantize.fp8 import FP8 as FP8
from tokopt.passes.quantize.gptq import GPTQ as GPTQ
from tokopt.passes.quantize.int8 import Int8 as Int8
from tokopt.passes.quantize.keep_grid import KeepGrid as KeepGrid
from tokopt.passes.quantize.nupes import NUPES as NUPES
from tokopt.passes.quantize.rtn import RTN as RTN
from tokopt.passes.quantize.smoothquant import SmoothQuant as SmoothQuant
from tokopt.passes.reduce.divprune import DivPrune as DivPrune
from tokopt.passes.reduce.evit import EViT as EViT
from tokopt.passes.reduce.kcenter import KCenter as KCenter
from tokopt.passes.reduce.pitome import PiToMe as PiToMe
from tokopt.passes.reduce.random import RandomPrune as RandomPrune
from tokopt.passes.reduce.tome import ToMe as ToMe
from tokopt.passes.sample.sample import SampleTokens as SampleTokens
from tokopt.passes.speculate.speculate import Speculate as Speculate
from tokopt.passes.speculate.verify import Verify as Verify
from tokopt.pipeline.base import Pass

PASSES: dict[str, str]

def load_pass(name: str) -> type[Pass]: ...
