"""Features of many images: the one extractor and the one store, PCA, similarity and k-NN."""

from pixio.features.extraction import FeatureExtractor, TokenFeatures, find_images
from pixio.features.knn import KNNClassifier
from pixio.features.pca import pca_colors, reduce_features, similarity
from pixio.features.store import FeatureStore, StoredArray, read_features, write_file, write_folder

__all__ = [
    "FeatureExtractor",
    "FeatureStore",
    "KNNClassifier",
    "StoredArray",
    "TokenFeatures",
    "find_images",
    "pca_colors",
    "read_features",
    "reduce_features",
    "similarity",
    "write_file",
    "write_folder",
]
