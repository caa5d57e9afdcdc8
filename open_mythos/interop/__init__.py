"""Public checkpoints of other projects, converted to models of this library.

- ``read``: a folder of safetensors (or of pickles, on request) as a configuration and tensors.
- ``names``: rules that make our tensors from theirs, strict both ways.
- ``provenance``: where a converted model comes from, written beside it.
- ``dense``, ``dense_source``, ``retrofit``, ``check``, ``healing``: dense models of transformers,
  made looped, compared with what they were, and trained further.

A family is a configuration and a list of rules::

    source = read_source("folder")
    model = OpenMythos(config_from(source.config))
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        *per_block(LLAMA_BLOCK, pairs),        # pairs: ("recurrent.blocks.0", 5), ...
        Rule("recurrent.halting.gate.bias", (), fixed(torch.zeros(1))),
    ]
    model.load_state_dict(renamed(source.tensors, rules, model_tensors(model)), strict=False)
"""
