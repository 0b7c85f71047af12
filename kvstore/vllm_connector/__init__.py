"""vLLM's side of the hand-over and of the store: what vLLM loads into its own processes, and what follows its events.

`connector.py` is the class that vLLM makes, twice: `scheduler_side.py` lives beside its scheduler, `worker_side.py`
beside the model; a `plan.py` travels between them each step. `events.py` lives in pdserve's process and reads what
vLLM's own prefix cache takes up and gives up. Importing this package imports neither vllm nor torch.
"""
