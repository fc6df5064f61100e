//! Everything that can go wrong while an image is built: the object, what was found, what
//! is allowed and, where there is one, the mend.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a guest image could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {operation} {path}", path = path.display())]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} is {found} bytes, at most {max} are allowed for {what}", path = path.display())]
    TooLarge { path: PathBuf, what: &'static str, found: u64, max: u64 },
    #[error("the program '{tool}' cannot be run; install it (Debian package {package})")]
    ToolMissing { tool: &'static str, package: &'static str, source: std::io::Error },
    #[error("'{tool}' failed on {object}: {message}; the file is corrupt or not of this format")]
    ToolFailed { tool: &'static str, object: String, message: String },

    #[error(
        "{path} is not a Debian kernel package: it holds {found} files {pattern}, exactly one is needed; \
         take the real linux-image-*-amd64 package, not a metapackage",
        path = path.display()
    )]
    NotAKernelPackage { path: PathBuf, pattern: &'static str, found: usize },
    #[error(
        "{path} has no modules of kernel {release}: neither {path}/kernel nor {path}/{release}/kernel is a directory; \
         give --modules the /lib/modules directory that belongs to the kernel",
        path = path.display()
    )]
    NoModules { path: PathBuf, release: String },
    #[error("{path} is missing; make it with: depmod -b BASE {release} (BASE holds lib/modules/{release})", path = path.display())]
    NoModulesDep { path: PathBuf, release: String },
    #[error("{path} line {line}: found {found:?}, expected {expected}", path = path.display())]
    Syntax { path: PathBuf, line: usize, found: String, expected: &'static str },
    #[error(
        "module '{name}' ({why}) is neither in modules.dep nor built into kernel {release}; \
         correct the list of modules or choose another kernel"
    )]
    ModuleMissing { name: String, why: String, release: String },
    #[error("modules.dep: the dependencies of '{name}' form a circle")]
    ModuleCycle { name: String },
    #[error("module {path}: unknown file name, expected .ko, .ko.xz, .ko.zst or .ko.gz", path = path.display())]
    ModuleFormat { path: PathBuf },
    #[error("module {path} is not an x86_64 ELF object: {source}", path = path.display())]
    ModuleElf { path: PathBuf, source: ElfError },

    #[error("{path} is not a usable kernel", path = path.display())]
    Kernel { path: PathBuf, source: KernelError },
    #[error("the agent {path} is not a static x86_64 executable; build it with: cargo build --release -p spore-agent", path = path.display())]
    Agent { path: PathBuf, source: ElfError },
    #[error("cpio entry {path:?}: {reason}")]
    Cpio { path: String, reason: &'static str },
}

/// What is wrong with an ELF file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ElfError {
    #[error("it is {found} bytes, an ELF header has {min}")]
    Short { found: usize, min: usize },
    #[error("it begins with {found:02x?}, not with the ELF magic")]
    Magic { found: [u8; 4] },
    #[error("ELF class {class} and byte order {order}, expected 2 (64 bits) and 1 (little endian)")]
    Class { class: u8, order: u8 },
    #[error("ELF machine {found}, expected 62 (x86_64)")]
    Machine { found: u16 },
    #[error("ELF type {found}, expected {expected}")]
    Type { found: u16, expected: &'static str },
    #[error(
        "its program headers ({count} of {size} bytes at {offset}) lie outside the file or are malformed"
    )]
    ProgramHeaders { offset: u64, count: u16, size: u16 },
    #[error("it has no loadable segment")]
    NoSegment,
    #[error("segment {index} lies outside the file")]
    Segment { index: u16 },
    #[error("it is linked dynamically (interpreter {interpreter})")]
    Dynamic { interpreter: String },
}

/// What is wrong with a bzImage.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum KernelError {
    #[error("it is {found} bytes, a bzImage has at least {min}")]
    Short { found: usize, min: usize },
    #[error("the setup header has no 'HdrS' at 0x202 (found {found:02x?}): not a Linux bzImage")]
    Magic { found: [u8; 4] },
    #[error("boot protocol {found:#06x}, at least 0x0208 (Linux 2.6.26) is needed")]
    Protocol { found: u16 },
    #[error("the kernel's version string at {offset:#x} is outside the setup code or not text")]
    Version { offset: usize },
    #[error("the payload ({length} bytes at {offset}) lies outside the file of {size} bytes")]
    PayloadRange { offset: u64, length: u64, size: u64 },
    #[error("the payload begins with {found:02x?}: not gzip, xz, zstd, lz4 or ELF")]
    PayloadFormat { found: [u8; 6] },
    #[error("the payload says that it unpacks to {found} bytes, at most {max} are allowed")]
    PayloadSize { found: u64, max: u64 },
    #[error("the payload unpacks to {found} bytes, its trailer says {expected}")]
    PayloadMismatch { found: u64, expected: u64 },
    #[error("the unpacked payload is not an x86_64 kernel: {0}")]
    PayloadElf(ElfError),
}

/// Adds path and operation to an I/O error.
pub(crate) trait IoContext<T> {
    fn context(self, operation: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn context(self, operation: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { operation, path: path.to_owned(), source })
    }
}
