import torch.distributed as dist

from lib.distributed.process_group import ProcessGroup


def test_a_group_on_gpus_is_aborted_by_torchs_own_function_which_exists(monkeypatch):
    calls = []
    # Raises if this version of torch has no such function.
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("aborted"))
    ProcessGroup(rank=0, count=2, device="cpu").abort()
    assert calls == []
    ProcessGroup(rank=0, count=2, device="cuda").abort()
    assert calls == ["aborted"]
