"""What a run imports, most of it late: the server that ranks are forked from does so once for all of them."""

# ruff: noqa: F401 (to import them is all)
import gc

import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.stage3
import pyarrow.ipc
import torch._dynamo
import torch.utils.tensorboard
from deepspeed.checkpoint import ds_to_universal
from tensorboard.plugins.hparams import api_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_tokimg.engine import startup
from ds_tokimg.inference import loading, texts
from ds_tokimg.training import loop, restarts, run

startup.import_muon()
# Ranks collect their own garbage alone: DeepSpeed asks for that at every start, and all of the above takes it a second.
gc.collect()
gc.freeze()
