//! What each provisioner does to a guest.
