"""What a model needs on which GPUs: arithmetic over a model's `config.json` and the data sheets of GPUs.

Nothing here asks a network or a GPU. The parts, in the order in which they build on each other:

    architecture  config.json as the dimensions that the sums need
    parameters    every matrix of the model, with its size and how it is split
    weights       bytes of those matrices in each precision
    cache         bytes of the KV cache of a token and of a request
    gpus          memory, bandwidth and formats of each GPU, with sources
    reserve       what an engine keeps back from the GPU's memory
    splits        which degrees of tensor, pipeline and expert parallelism an engine accepts
    fit           all of it together: does it fit, and why not
    speed         how fast decoding can be at most
    advice        the smallest set-up, and the table over all GPUs
    commands      what starts it, for each engine
    written       a configuration file of the gateway for it

Two units are kept apart by name: `GB` is 10^9 bytes, as on data sheets and hubs; `GiB` is 2^30 bytes, as drivers and
engines print it.
"""
