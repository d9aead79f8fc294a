"""vLLM loads an export and says the same; the environment of these tests holds vLLM's CPU build."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_model, make_tokenizer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: it has an environment of its own")

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.mark.slow
def test_vllm_says_the_same_from_a_merged_export(rlif, small_fit, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # Not the toy: vLLM's attention on a CPU takes no heads of 16.
    make_model("qwen2", hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        tmp_path / "base"
    )
    make_tokenizer().save_pretrained(tmp_path / "base")
    root = rlif("fit", *small_fit, "--model.name", tmp_path / "base", f"--model.lora={json.dumps(LORA)}",
                "--model.optimizer.lr=0.02", "--trainer.max_steps=3", "--evaluation.temperature=0.8")  # fmt: skip
    rlif("export", root / "runs" / "run" / "1")
    folder = root / "runs" / "run" / "1" / "export" / "merged"
    chats = [[{"role": "user", "content": f"What is {n} + {n * n}?"}] for n in range(16)]

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    engine = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, seed=0)
    usual = engine.get_default_sampling_params()  # those of generation_config.json
    assert (usual.temperature, usual.top_k, usual.top_p, usual.repetition_penalty) == (0.8, 0, 1.0, 1.0)
    found = engine.chat(chats, vllm.SamplingParams(temperature=0, max_tokens=16, logprobs=0), use_tqdm=False)
    for chat, request in zip(chats, found, strict=True):
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert request.prompt_token_ids == prompt["input_ids"][0].tolist()
        output = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
        said, start = request.outputs[0], len(request.prompt_token_ids)
        assert list(said.token_ids) == output[start:].tolist()
        with torch.no_grad():
            logprobs = model(input_ids=output[None]).logits[0].log_softmax(-1)
        for position, token in enumerate(said.token_ids, start):
            own = float(logprobs[position - 1, token])
            assert said.logprobs[position - start][token].logprob == pytest.approx(own, abs=1e-4)
    assert len({request.outputs[0].text for request in found}) > 5
