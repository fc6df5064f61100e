import shutil
import sqlite3


class Load:
    """Transfers between accounts of an SQLite database, each a transaction with a line of its history."""

    PATH = HOME + "/bank.db"
    ACCOUNTS = 500 * SCALE
    EACH = 1000
    HISTORY = 500 * SCALE

    def connect(self, path):
        database = sqlite3.connect(path, isolation_level=None)
        for pragma in ["journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 64"]:
            database.execute("PRAGMA " + pragma)
        return database

    def begin(self):
        self.database = self.connect(self.PATH)
        self.database.executescript(
            f"""
            BEGIN;
            CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
            CREATE TABLE history (count INTEGER PRIMARY KEY, giver INTEGER, taker INTEGER, amount INTEGER, note BLOB);
            CREATE INDEX givers ON history (giver, amount);
            CREATE TABLE counter (count INTEGER NOT NULL);
            INSERT INTO counter VALUES (0);
            WITH RECURSIVE ids (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM ids WHERE id + 1 < {self.ACCOUNTS})
            INSERT INTO accounts SELECT id, {self.EACH} FROM ids;
            COMMIT;
            """
        )
        self.balances = [self.EACH] * self.ACCOUNTS

    def one(self, database, query):
        return database.execute(query).fetchone()[0]

    def step(self, count):
        giver, taker = random.sample(range(self.ACCOUNTS), 2)
        amount = random.randint(1, 50)
        run = self.database.execute
        run("BEGIN IMMEDIATE")
        same("the database's count, and memory's", self.one(self.database, "SELECT count FROM counter"), count - 1)
        for account, change in [(giver, -amount), (taker, amount)]:
            run("UPDATE accounts SET balance = balance + ? WHERE id = ?", (change, account))
            self.balances[account] += change
        note = os.urandom(random.randint(10, 2000))
        run("INSERT INTO history VALUES (?, ?, ?, ?, ?)", (count, giver, taker, amount, note))
        run("DELETE FROM history WHERE count <= ?", (count - self.HISTORY,))
        run("UPDATE counter SET count = ?", (count,))
        run("COMMIT")

    def check(self, count, crash):
        for path in [self.PATH, self.PATH + "-wal"]:
            forget(path)
        self.examine("the database", self.PATH, count)
        # As after a loss of power: with its log, and nothing that connections share.
        copy = HOME + "/copy.db"
        shutil.copyfile(self.PATH, copy)
        shutil.copyfile(self.PATH + "-wal", copy + "-wal")
        self.examine("its copy", copy, count)
        os.remove(copy)

    def examine(self, what, path, count):
        database = self.connect(path)
        found = [row[0] for row in database.execute("PRAGMA integrity_check")]
        same(f"{what}: integrity_check after step {count}", found, ["ok"])
        same(f"{what}: count after step {count}", self.one(database, "SELECT count FROM counter"), count)
        lines = database.execute("SELECT min(count), max(count), count(*) FROM history").fetchone()
        length = min(count, self.HISTORY)
        same(f"{what}: history after step {count}", lines, (count - length + 1, count, length))
        balances = [row[0] for row in database.execute("SELECT balance FROM accounts ORDER BY id")]
        same(f"{what}: sum after step {count}", sum(balances), self.ACCOUNTS * self.EACH)
        different = [(at, found, expected) for at, (found, expected) in enumerate(zip(balances, self.balances)) if found != expected]
        same(f"{what}: accounts after step {count} (which, found, memory's)", different, [])
        database.close()

    def facts(self):
        return {"bytes": os.stat(self.PATH).st_size, "log": os.stat(self.PATH + "-wal").st_size}
