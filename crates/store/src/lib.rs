//! Blobs, manifests and references in an OCI image layout.
