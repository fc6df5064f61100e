//! Links the agent at a fixed address. The guest starts it twice before a container runs (PID 1
//! and the runtime helper), and a position-independent one relocates its 27,000 pointers each
//! time: 60 ms instead of 140 for the helper on the emulated ground (`tests/bench/README.md`).
//! What randomises addresses is for programs that strangers talk to; only the host talks to
//! the agent.

fn main() {
    println!("cargo:rustc-link-arg-bin=spore-agent=-no-pie");
    println!("cargo:rustc-link-arg-bin=spore-agent=-static");
}
