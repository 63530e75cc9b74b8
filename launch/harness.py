"""Run lm-evaluation-harness, with our model in its table.

python launch/harness.py --model mhr_scale --model_args adapter=RUN,task=NAME --tasks TASK ...

All arguments are those of `lm_eval`; `mhr_scale.exchange.harness` says those of the model.
"""

from mhr_scale.verbs.launching import later, main_of_words

if __name__ == "__main__":
    main_of_words(later("harness:run_harness"))
