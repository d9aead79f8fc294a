"""Score completions that you have: how sure is a model of them? Any causal language model of Hugging Face will do.

`python examples/score.py` compares a right and a wrong sum (of last digits), and shows what each token is worth.
"""

from rlif_lightning import score
from rlif_lightning.rewards import ProbabilityMargin, SelfCertainty

PROMPTS = ["3+5-9+2>"] * 2
COMPLETIONS = ["3+5=8;8-9=9;9+2=1;#1", "3+5=7;7-9=8;8+2=0;#0"]

if __name__ == "__main__":
    # Loaded objects as well: score(model, tokenizer, ...), and token ids in place of texts.
    scores = score("toy", None, PROMPTS, COMPLETIONS, rewards=[ProbabilityMargin(), SelfCertainty("bottom_q")])
    for row, text in enumerate(COMPLETIONS):
        print(text)
        for name in ("logprob", "entropy", "self_certainty"):
            print(f"  {name} {getattr(scores, name)[row]:.2f} nats per token")
        for name, values in scores.rewards.items():
            print(f"  reward {name} {values[row]:.2f}")
        tokens = scores.tokens.logprob[row, : scores.lengths[row]]
        print("  log-probability of its tokens:", *(f"{x:.1f}" for x in tokens))
