//! Joining and mirroring in namespaces of the test's own, with real links of the kernel's. Needs
//! root, /dev/net/tun and tc.

mod joining;
mod mirroring;
mod naming;
mod packet;
mod passing;
mod space;
mod threading;
