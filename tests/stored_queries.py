"""Ranks of targets by the rows of a store alone, by brute force: for every query each image that may be found."""

import numpy as np


def brute_force_ranks(rows):
    """Returns for each query how many images beat its target, by FashionIQ's rule or CIRR's, and, by CIRR's, how many
    do so among its members."""
    images = [row for row in rows if row["kind"] == "image"]
    found = []
    for query in (row for row in rows if row["kind"] == "query"):
        asked, target, members = np.array(query["vector"], np.float64), query["target"], query["members"]
        scores = {image["id"]: float(asked @ np.array(image["vector"], np.float64)) for image in images}
        labels = {image["id"]: image["label_name"] for image in images}
        if members:
            others = scores.keys() - {target, query["reference"]}
        else:
            others = {key for key in scores if labels[key] == query["label_name"]} - {target}
        better = {key for key in others if scores[key] >= scores[target]}
        found.append((len(better), len(better & {*members})))
    return found
