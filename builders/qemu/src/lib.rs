//! The QEMU builder: machines, overlays, seeds and bases.
