import inspect

from torch.nn.parallel import DistributedDataParallel

from tests import training_factory as factory
from training.adapter import add_adapter
from training.trainer import Denoiser


def test_processes_exchange_the_lora_and_not_the_frozen_base():
    transformer = factory.transformer("2b")
    add_adapter(transformer, rank=2, alpha=2, targets=("to_q",))
    denoiser = Denoiser(transformer)
    exchanged = {name for name, _ in denoiser.named_parameters()} - set(
        denoiser._ddp_params_and_buffers_to_ignore
    )
    assert exchanged == {name for name, _ in denoiser.named_parameters() if "lora_" in name}
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel)
