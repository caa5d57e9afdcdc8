"""Public checkpoints of other projects, converted to models of this library.

- ``read``: a folder of safetensors (or of pickles, on request) as a configuration and tensors.
- ``names``: rules that make our tensors from theirs, strict both ways.
- ``families``: what the configurations of looped models mean, and their rules.
- ``convert``: the whole way, from a source to a folder; ``provenance``: the record beside it.
- ``dense``, ``retrofit``, ``healing``: dense models made looped.

A family is a configuration and a list of rules::

    source = read_source("folder")
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        *per_block(llama_layer(norms), [("recurrent.blocks.0", 5), ("recurrent.blocks.1", 6)]),
        Rule("recurrent.halting.gate.bias", (), fixed(torch.zeros(1))),
    ]
    tensors = renamed(source.tensors, rules, model_tensors(model), dropped=["freqs_cis"])
"""
