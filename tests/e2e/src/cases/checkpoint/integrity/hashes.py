class Load:
    """A large area of memory and a tree of files, written and hashed piece by piece and file by file."""

    PIECE = 1 << 18
    PIECES = 64 * SCALE
    FILES = 32 * SCALE
    DIRECTORIES = 8
    TREE = HOME + "/tree"

    def begin(self):
        self.memory = mmap.mmap(-1, self.PIECE * self.PIECES)
        self.sums = [None] * self.PIECES
        for at in range(self.PIECES):
            self.memory[at * self.PIECE : (at + 1) * self.PIECE] = os.urandom(self.PIECE)
            self.sums[at] = self.sum(at)
        for at in range(self.DIRECTORIES):
            os.makedirs(f"{self.TREE}/{at}")
        self.files = {}
        for at in range(self.FILES):
            self.write(at, 0)

    def sum(self, at):
        with memoryview(self.memory) as all, all[at * self.PIECE : (at + 1) * self.PIECE] as piece:
            return hashlib.sha256(piece).hexdigest()

    def path(self, at, count):
        return f"{self.TREE}/{(at + count) % self.DIRECTORIES}/{at}"

    def write(self, at, count):
        """The file anew, in another directory; the old one goes."""
        before = self.files.get(at)
        content = os.urandom(BLOCK * random.randint(1, 16))
        path = self.path(at, count)
        with open(path + ".new", "wb") as file:
            file.write(content)
        os.rename(path + ".new", path)
        if before is not None and before[0] != path:
            os.remove(before[0])
        self.files[at] = (path, hashlib.sha256(content).hexdigest())

    def step(self, count):
        piece = count % self.PIECES
        same(f"hash of piece {piece} of the memory in step {count}", self.sum(piece), self.sums[piece])
        for _ in range(8):
            page = piece * self.PIECE + random.randrange(self.PIECE // BLOCK) * BLOCK
            self.memory[page : page + BLOCK] = os.urandom(BLOCK)
        self.sums[piece] = self.sum(piece)
        at = count % self.FILES
        path, digest = self.files[at]
        with open(path, "rb") as file:
            same(f"hash of {path} in step {count}", hashlib.sha256(file.read()).hexdigest(), digest)
        self.write(at, count)

    def check(self, count, crash):
        for at in range(self.PIECES):
            same(f"hash of piece {at} of the memory after step {count}", self.sum(at), self.sums[at])
        names = sorted(os.path.join(at, name) for at, _, names in os.walk(self.TREE) for name in names)
        same(f"the tree's files after step {count}", names, sorted(path for path, _ in self.files.values()))
        for path, digest in self.files.values():
            same(f"hash of {path} after step {count}", hashlib.sha256(direct(path)).hexdigest(), digest)

    def facts(self):
        return {"pieces": self.PIECES, "files": len(self.files)}
