"""Virtual time: the serving classes (policies, index, engine scheduler, store) around modelled hardware.

`events` is the clock, `engines` runs a real engine core without weights, `network` moves bytes, `worker` is an engine
with its hand-over and its node's store, `router` drives a policy as the real router does, `fleet` puts them together,
`trace` reads requests and `report` counts what users would have felt. Nothing here draws lots unless a seed says how.
"""
