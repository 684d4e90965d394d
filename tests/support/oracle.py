"""The method in float64, straight from its definition, to hold the job's artifacts to.

Written from section 2 of the design with dense numpy and scipy, sharing nothing with the package.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse


def projected(F, dim, whiten):
    """Principal components of the items that have the modality; zero rows for the others."""
    present = ~np.isnan(F[:, 0])
    centred = F[present] - F[present].mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / (present.sum() - 1))
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(dim)])
    out = np.zeros((len(F), dim))
    out[present] = centred @ vectors / (np.sqrt(values) if whiten else 1)
    return out


class Expected:
    """Everything the method says about one modality, given its centroids and who belongs to which.

    R is scipy sparse (U x I), F (I, D) with rows of NaN for missing items, both taken to float64.
    """

    def __init__(self, R, F, present=None):
        self.present = ~np.isnan(F[:, 0]) if present is None else present
        self.F = np.where(self.present[:, None], F, 0).astype(np.float64)
        full = scipy.sparse.csr_array(R, dtype=np.float64)
        full.sum_duplicates()
        self.R = full @ scipy.sparse.diags_array(self.present.astype(np.float64))
        self.item_degrees = np.asarray(full.sum(axis=0)).ravel()
        self.degrees = np.asarray(self.R.sum(axis=1)).ravel()
        self.warm = self.degrees > 0
        self.inverse = np.divide(1, self.degrees, out=np.zeros_like(self.degrees), where=self.warm)
        self.M = scipy.sparse.diags_array(self.inverse) @ (self.R @ self.F)

    def local(self, weighting):
        if weighting == "mean":
            return self.M
        by_item = np.divide(1, np.sqrt(self.item_degrees), out=np.zeros(len(self.F)), where=self.item_degrees > 0)
        return np.sqrt(self.inverse)[:, None] * (self.R @ (by_item[:, None] * self.F))

    def cluster_level(self, centroids, user_labels, item_labels):
        """G for warm users."""
        C = centroids.astype(np.float64)
        if item_labels is None:
            return np.where(self.warm[:, None], C[user_labels], 0)
        by_item = np.where(self.present[:, None], C[item_labels], 0)
        return self.inverse[:, None] * (self.R @ by_item)

    def users(self, centroids, user_labels, item_labels, lam, weighting, scale):
        """X, and the factor it was scaled with."""
        G = self.cluster_level(centroids, user_labels, item_labels)
        lam = np.broadcast_to(lam, len(G))[:, None]
        X = lam * self.local(weighting) + (1 - lam) * G
        X[~self.warm] = G[self.warm].mean(axis=0)
        factor = 1.0
        if scale == "items":
            factor = np.linalg.norm(self.F[self.present], axis=1).mean() / np.linalg.norm(X, axis=1).mean()
        return factor * X, factor


def squared_distances(points, centroids):
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    return np.stack([((points - one) ** 2).sum(axis=1) for one in centroids], axis=1)


def assert_nearest(points, centroids, labels):
    """Every label is the nearest centroid, but for ties within float32's rounding."""
    distances = squared_distances(points, centroids)
    chosen = distances[np.arange(len(points)), labels]
    assert (chosen <= distances.min(axis=1) * (1 + 1e-5) + 1e-6 * distances.mean()).all()


def assert_means(points, centroids, labels):
    """Every centroid is the mean of its members."""
    for k, centroid in enumerate(centroids):
        if (labels == k).any():
            mean = points[labels == k].mean(axis=0)
            assert_close(centroid, mean)


def assert_close(found, expected, tolerance=2e-5):
    """Relative to the length of each row, and so to any norm of the whole."""
    found, expected = np.atleast_2d(np.asarray(found, np.float64)), np.atleast_2d(expected)
    error = np.linalg.norm(found - expected, axis=1)
    length = np.linalg.norm(expected, axis=1)
    worst = (error - tolerance * length).argmax()
    assert (error <= tolerance * length + 1e-12).all(), f"row {worst}: off by {error[worst]} of {length[worst]}"


def lambdas(policy, expected, G, temperature=0.1):
    """Lambda of each user from its definition, user by user and pair by pair; shrink with tau from the data."""
    weights = expected.R.toarray()
    lam = np.zeros(len(weights))
    warm = np.flatnonzero(expected.warm)
    if policy == "attention":
        with np.errstate(invalid="ignore"):
            unit = np.nan_to_num(expected.F / np.linalg.norm(expected.F, axis=1)[:, None])
        for u in warm:
            own = np.flatnonzero(weights[u])
            pairs = np.outer(weights[u, own], weights[u, own])
            np.fill_diagonal(pairs, 0)
            among = (pairs * (unit[own] @ unit[own].T)).sum() / pairs.sum() if len(own) > 1 else 0.0
            to_global = np.average(unit[own] @ (G[u] / np.linalg.norm(G[u])), weights=weights[u, own])
            lam[u] = 1 / (1 + np.exp(-(among - to_global) / temperature))
        return lam
    n = weights[warm].sum(axis=1) ** 2 / (weights[warm] ** 2).sum(axis=1)
    inside = [np.average(((expected.F - expected.M[u]) ** 2).sum(axis=1), weights=weights[u]) for u in warm]
    within = (n * inside).sum() / (n - 1).sum()
    m = np.average(expected.M[warm], axis=0, weights=n)
    apart = (n * ((expected.M[warm] - m) ** 2).sum(axis=1)).sum()
    between = (apart - (len(warm) - 1) * within) / (n.sum() - (n**2).sum() / n.sum())
    lam[warm] = n / (n + (within / between if between > 0 else np.median(n)))
    return lam
