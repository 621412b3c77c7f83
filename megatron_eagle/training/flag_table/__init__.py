"""Judge every flag of Megatron's parser: honoured, the base's, without effect, or refused.

* ``judgement``: what a judgement is.
* ``model_flags``, ``layer_flags``, ``run_flags``, ``system_flags``, ``other_flags``: judgements.
* ``table``: all of them, by flag.
* ``conditions``: what also depends on other flags and on what is installed.
* ``check``: the user's command line against the table.
"""
