//! The tags that kiln gives to AMIs and snapshots, and finds them by.

/// The name that AWS's console shows.
pub const TITLE: &str = "Name";
/// Name of the image.
pub const NAME: &str = "kiln:name";
/// Its version.
pub const VERSION: &str = "kiln:version";
/// Digest of its manifest.
pub const DIGEST: &str = "kiln:digest";
/// Its architecture in OCI's words.
pub const ARCHITECTURE: &str = "kiln:architecture";
/// On a snapshot: disk digest of what is in it.
pub const DISK_DIGEST: &str = "kiln:disk-digest";
/// On a snapshot: the disk's virtual size in bytes, since volumes have whole GiB.
pub const DISK_SIZE: &str = "kiln:disk-size";
/// Commit of the template's source.
pub const COMMIT: &str = "kiln:commit";
/// The bake's id.
pub const BAKE: &str = "kiln:bake";
/// On what a bake has made and not finished: AMIs and snapshots that no store
/// records yet. Its value means nothing.
pub const UNFINISHED: &str = "kiln:unfinished";
/// On a snapshot: ARN of the KMS key that was asked for. Without, it is
/// encrypted or not as the account does by default.
pub const KEY: &str = "kiln:kms-key";
