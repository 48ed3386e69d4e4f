//! Models on disk: references, the catalogue, the cache, pulling and verifying.
