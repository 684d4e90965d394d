"""A library in MMRec's layout, as small as can be: matrix factorization that asks for an image and a text.

It asks for what the real ones ask of older packages, and imports what they import and never use.
"""

import json
import textwrap

SMALL_LIBRARY = {
    "utils/configurator.py": """
        import json, torch
        class Config(dict):
            def __init__(self, model, dataset, given):
                super().__init__(json.load(open("configs/overall.json")))  # from the working folder, as MMRec
                self.update(given, model=model, dataset=dataset, device=torch.device("cpu"))
            def __getitem__(self, name):
                return self.get(name)
        """,
    "utils/dataset.py": """
        import os
        import lmdb, torchvision.transforms as transforms
        from torchvision.transforms.functional import pad
        import pandas as pd
        class RecDataset:
            def __init__(self, config, frame=None):
                self.config, self.frame = config, frame
                if frame is None:
                    path = os.path.join(config["data_path"] + config["dataset"], config["inter_file_name"])
                    self.frame = pd.read_csv(path, sep=config["field_separator"])
                self.sizes = self.frame[[config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]]].max() + 1
            def __str__(self):
                self.inter_num = len(self.frame)
                return str(self.inter_num)
            def split(self):
                label = self.frame[self.config["inter_splitting_label"]]
                parts = [RecDataset(self.config, self.frame[label == i]) for i in range(3)]
                known = parts[0].frame[self.config["USER_ID_FIELD"]]
                for part in parts:
                    part.frame = part.frame[part.frame[self.config["USER_ID_FIELD"]].isin(known)]
                    part.sizes = self.sizes
                return parts
        """,
    "utils/dataloader.py": """
        import random, torch
        class TrainDataLoader:
            def __init__(self, config, dataset, batch_size, shuffle):
                dataset.inter_num  # there after str() alone
                self.pairs = torch.tensor(dataset.frame[[config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]]].values)
                self.dataset = dataset
            def pretrain_setup(self):
                self.first = random.random()
        class EvalDataLoader:
            def __init__(self, config, dataset, additional_dataset, batch_size):
                dataset.inter_num
                self.groups = dataset.frame.groupby(config["USER_ID_FIELD"])[config["ITEM_ID_FIELD"]].apply(set)
                seen = additional_dataset.frame.groupby(config["USER_ID_FIELD"])[config["ITEM_ID_FIELD"]].apply(list)
                self.seen = [seen[user] for user in self.groups.index]
            def get_eval_users(self):
                return torch.tensor(self.groups.index.values)
        """,
    "utils/utils.py": """
        import importlib, random, numpy as np, torch
        def init_seed(seed):
            random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
        def get_model(name):
            return getattr(importlib.import_module("models." + name.lower()), name)
        def get_trainer():
            return importlib.import_module("common.trainer").Trainer
        """,
    "common/trainer.py": """
        import numpy as np, torch
        class Evaluator:
            def evaluate(self, batches, loader, is_test=False, idx=0):
                top = torch.cat(batches).tolist()
                hits = [[item in wanted for item in row] for row, wanted in zip(top, loader.groups)]
                sizes = np.array([len(wanted) for wanted in loader.groups], np.float)
                found = {f"recall@{k}": float((np.array(hits)[:, :k].sum(1) / sizes).mean()) for k in (10, 20)}
                return {**found, "ndcg@10": 0.0, "ndcg@20": 0.0}
        class Trainer:
            def __init__(self, config, model):
                self.config, self.model, self.evaluator = config, model, Evaluator()
                self.optimizer = torch.optim.Adam(model.parameters(), config["learning_rate"])
                self.stopping_step, self.cur_step = config["stopping_step"], 0
                self.best_valid_result = self.best_test_upon_valid = {}
            def evaluate(self, loader):
                scores = self.model.full_sort_predict(loader.get_eval_users()).detach()
                for row, seen in enumerate(loader.seen):
                    scores[row, seen] = -1e10
                return self.evaluator.evaluate([scores.topk(20).indices], loader)
            def fit(self, train_data, valid_data, test_data, saved, verbose):
                best = -1
                for epoch in range(self.config["epochs"]):
                    loss = self.model.calculate_loss(train_data.pairs)
                    if torch.isnan(loss):
                        break
                    self.optimizer.zero_grad(); loss.backward(); self.optimizer.step()
                    valid, test = self.evaluate(valid_data), self.evaluate(test_data)
                    self.cur_step += 1
                    if valid["recall@20"] > best:
                        best, self.cur_step = valid["recall@20"], 0
                        self.best_valid_result, self.best_test_upon_valid = valid, test
                    if self.cur_step > self.stopping_step:
                        break
        """,
    "models/freedom.py": """
        import os, numpy as np, scipy.sparse as sp, torch
        from torch_scatter import scatter_add
        class FREEDOM(torch.nn.Module):
            def __init__(self, config, loader):
                super().__init__()
                users, items = loader.dataset.sizes
                self.user_embedding = torch.nn.Embedding(users, config["embedding_size"])
                self.item_id_embedding = torch.nn.Embedding(items, config["embedding_size"])
                self.result_embed = torch.nn.Parameter(torch.zeros(1))
                folder = config["data_path"] + config["dataset"]
                for name in ("vision", "text"):
                    assert len(np.load(os.path.join(folder, config[name + "_feature_file"]))) == items
                open(os.path.join(folder, "cache.pt"), "w").close()
                matrix = sp.dok_matrix((2, 2), dtype=np.float32)
                matrix._update({(0, 1): 1.0})
                assert matrix.sum() == 1
                rows = torch.tensor([0, 2, 0])
                assert scatter_add(torch.ones(3), rows, dim=0, dim_size=4).tolist() == [2, 0, 1, 0]
                assert self.user_embedding.weight.cuda() is self.user_embedding.weight
                print("noise of the library")
            def calculate_loss(self, pairs):
                self.result_embed = self.user_embedding(pairs[:, 0]) * self.item_id_embedding(pairs[:, 1])
                return -torch.nn.functional.logsigmoid(self.result_embed.sum(1)).mean() * (CONFIG_NAN or 1)
            def full_sort_predict(self, users):
                return self.user_embedding(users) @ self.item_id_embedding.weight.T
        CONFIG_NAN = float(os.environ.get("MAKE_NAN", 0))
        """,
}


def write(root):
    """Write it to a folder, and give the folder."""
    for name, text in SMALL_LIBRARY.items():
        path = root / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (root / "src" / "configs" / "model").mkdir(parents=True)
    (root / "src" / "configs" / "model" / "FREEDOM.yaml").touch()
    overall = {"embedding_size": 8, "epochs": 6, "stopping_step": 2, "hyper_parameters": ["learning_rate", "seed"]}
    overall |= {"learning_rate": [0.01, 0.1], "seed": [999], "train_batch_size": 64, "eval_batch_size": 64}
    (root / "src" / "configs" / "overall.json").write_text(json.dumps(overall))
    return root
