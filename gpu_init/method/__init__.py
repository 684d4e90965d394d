"""The method on arrays: SG-URInit (SIGIR 2026, arXiv 2604.14839), built from public readings of the paper.

Notation. ``R`` (U x I) are the weights of the interactions, by rows; ``F`` (I x D) one modality's item features; ``K``
the number of clusters; ``N(u)`` the items of user u that have the modality. The degrees ``D_U`` and ``D_I`` are sums of
weights over these. Every modality is treated by itself.

1. Weights. ``w_ui >= 0`` is 1 for an interaction, or comes from a column; weights of equal pairs are summed. With a
   half-life, a weight decays by ``2^(-(t_u - t) / half_life)``, ``t_u`` the user's newest interaction
   (`gpu_init.inputs.recency`, `matrix.build`).
2. Features. They are taken as they are, or projected to fewer columns by PCA of all items that have the modality,
   optionally whitened. The items are projected once, before anything is aggregated (`projection.fit_projection`).
3. Local part. ``L = A F``. With ``weighting = "mean"``, ``A = D_U^-1 R``, the interaction-weighted mean of the user's
   items; with ``"sym"``, ``A = D_U^-1/2 R D_I^-1/2``, as LightGCN propagates (`weighting.weighting`).
4. Clusters. K-means, seeded by k-means++ on a sample, then passes over all rows until one lowers the inertia by little
   (`kmeans.fit`). The rows are the users' means ``M = D_U^-1 R F``, whatever the weighting of the local part; or the
   items' rows of F (`clusters.cluster_items`); or users by what they did, whatever the features (`spectral.fit`).
5. Global part. ``G_u`` is the centroid of the user's cluster; where items are clustered, the interaction-weighted mean
   of the centroids of the user's items (`blend.global_part`).
6. Blend. ``X_u = lambda_u L_u + (1 - lambda_u) G_u``. Lambda is a number; or ``n_u / (n_u + tau)`` by the policy
   "shrink" (`lambdas.shrink`, `lambdas.tau_of`); or, by "attention", it depends on how alike the user's items are
   and how near they are to ``G_u`` (`lambdas.attention`). One fused pass makes the rows (`blend.blend`).
7. Scale. Optionally one factor makes the mean norm of X that of the items (`gpu_init.run.rescale`): means are several
   times shorter than what they are means of.
8. Cold users, who have no usable interaction in the modality, get the mean of G over the other users and label -1
   (`clusters.mean_global`). An item without features drops out of the modality's sums, weights and degrees, and of
   nothing else.

Three facts make it scale. K-means has to be good, not finished: a sample finds the centroids. The matrix of the users'
means never has to exist: passes need ``A (F C^T)``, K columns and not D, and the update ``(Z^T A) F``, with Z the
one-hot labels (`points.Factored`). And the result is written in one pass, each byte once.

Ours, and not the paper's: weights other than 1; the mean as the default weighting; clusters on the users' means
whatever the weighting; the embedding of the interactions; both lambda policies; the automatic number of clusters;
recency; K-means that starts on a sample and ends when it is good; the projection; the scale; what cold users get.

Arrays in, arrays out: nothing here reads or writes a file.
"""
