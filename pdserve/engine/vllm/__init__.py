"""The production engine: vLLM's AsyncLLM inside the worker, KV moved by our own connector.

`engine.py` is the `HandoverEngine`; `driver.py` owns AsyncLLM and its event loop; `board.py` and `staging.py` are the
two pieces of shared memory between this process and vLLM's workers, where `kvstore.vllm_connector` reads and writes
them through `pages.py`. Nothing here imports vllm or torch before an engine is made.
"""
