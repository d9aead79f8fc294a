"""Self-certainty as the reward of TRL's GRPOTrainer, with the collapse guard. Needs `pip install "trl>=1.16,<1.17"`.

`python examples/trl_reward.py` trains the toy until agreement falls, and goes back. Nothing reads labels.
"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rlif_lightning import AnswerFormat
from rlif_lightning.integrations.trl import GuardCallback, InternalReward
from rlif_lightning.rewards import SelfCertainty
from rlif_lightning.toy import toy_model, toy_problems

if __name__ == "__main__":
    folder = toy_model("toy")
    reward = InternalReward(SelfCertainty(), answers=AnswerFormat(completion=r"#(\d)$", compare="exact"))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
        callbacks=[reward, guard := GuardCallback("restore")],
        train_dataset=Dataset.from_list([{"prompt": f"{row['question']}>"} for row in toy_problems("train", n=2000)]),
        args=GRPOConfig(
            output_dir="runs/trl", max_steps=100, per_device_train_batch_size=128, num_generations=8,
            max_completion_length=32, learning_rate=3e-4, lr_scheduler_type="constant", bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1,  # the guard judges each rollout
        ),
    )  # fmt: skip
    trainer.train()
    for row in trainer.state.log_history[:-1:5]:
        agreement, certainty = row["rollout/agreement"], row["rewards/self_certainty/mean"]
        print(f"step {row['step']}: agreement {agreement:.2f}, self-certainty {certainty:.2f}")
    print("The model has the weights of step", guard.rule.best_step)
