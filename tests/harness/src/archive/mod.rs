//! Writers of the two archive formats that the test bed needs: cpio (the outer machine's
//! initramfs) and tar (layers of OCI images). Both write only what we make ourselves, in a
//! fixed order with fixed times, so that the same input gives the same bytes.

pub mod cpio;
pub mod tar;
