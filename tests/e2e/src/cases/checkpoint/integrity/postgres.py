import signal
import subprocess

BIN = "/usr/lib/postgresql/17/bin/"
DATA = "/var/lib/postgresql/data"
PATIENCE = 60


class Session:
    """psql, which is asked line by line and answers to a marker."""

    END = "-- end --"

    def __init__(self):
        command = [BIN + "psql", "-XAqt", "-v", "ON_ERROR_STOP=1", "-h", "/tmp", "-U", "postgres", "postgres"]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.psql = subprocess.Popen(command, text=True, bufsize=1, **streams)

    def ask(self, query):
        """The rows that a query gives, as text."""
        try:
            self.psql.stdin.write(f"{query}\n\\echo {self.END}\n")
        except BrokenPipeError:
            pass
        lines = []
        for line in self.psql.stdout:
            if line.rstrip() == self.END:
                return lines
            lines.append(line.rstrip())
        raise Wrong(f"psql ended over {query!r}: {lines}")

    def close(self):
        self.psql.stdin.close()
        self.psql.stdout.close()
        self.psql.wait(PATIENCE)


class Load:
    """Transfers between accounts of a PostgreSQL database that verifies the checksums of its pages: some one after the other,
    counted in memory; others by two clients at once."""

    ACCOUNTS = 500 * SCALE
    EACH = 1000
    HISTORY = 500 * SCALE
    TRANSFER = f"""
        \\set giver random(0, {ACCOUNTS - 1})
        \\set taker random(0, {ACCOUNTS - 1})
        \\set amount random(1, 50)
        BEGIN;
        UPDATE accounts SET balance = balance - :amount WHERE id = least(:giver, :taker);
        UPDATE accounts SET balance = balance + :amount WHERE id = greatest(:giver, :taker);
        INSERT INTO others (id, amount) VALUES (least(:giver, :taker), -:amount), (greatest(:giver, :taker), :amount);
        COMMIT;
    """

    def begin(self):
        subprocess.run([BIN + "pg_checksums", "--enable", "--no-sync", "-D", DATA], check=True, capture_output=True)
        self.log = open(HOME + "/log", "ab")
        self.server = None
        self.start()
        self.session.ask(
            f"""
            CREATE EXTENSION amcheck;
            CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL);
            CREATE TABLE history (count int PRIMARY KEY, giver int, taker int, amount int, note text);
            CREATE INDEX givers ON history (giver, amount);
            CREATE TABLE others (id int, amount int);
            CREATE INDEX ids ON others (id);
            CREATE TABLE counter (count int NOT NULL);
            INSERT INTO accounts SELECT id, {self.EACH} FROM generate_series(0, {self.ACCOUNTS - 1}) AS id;
            INSERT INTO counter VALUES (0);
            """
        )
        with open(HOME + "/transfer.sql", "w") as file:
            file.write(self.TRANSFER)
        self.others = self.clients()

    def start(self):
        # Little of what it reads is to stay in its own memory.
        options = ["-c", "shared_buffers=4MB", "-c", "max_wal_size=32MB", "-c", "checkpoint_timeout=30s"]
        self.server = subprocess.Popen([BIN + "postgres", "-D", DATA, *options], stderr=self.log)
        end = time.monotonic() + PATIENCE
        ready = [BIN + "pg_isready", "-q", "-h", "/tmp"]
        while subprocess.run(ready).returncode != 0:
            same("the server's exit status while it starts", self.server.poll(), None)
            if time.monotonic() > end:
                raise Wrong(f"the server does not answer within {PATIENCE} s")
        self.session = Session()

    def clients(self):
        command = [BIN + "pgbench", "-n", "-c", "2", "-R", str(10 * SCALE), "-T", "1000000", "-f", HOME + "/transfer.sql", "-h", "/tmp"]
        return subprocess.Popen([*command, "-U", "postgres", "postgres"], stdout=self.log, stderr=self.log)

    def alive(self):
        for what, process in [("server", self.server), ("clients", self.others)]:
            if process.poll() is not None:
                with open(HOME + "/log", errors="replace") as file:
                    end = file.read()[-1500:]
                raise Wrong(f"the {what} ended with status {process.poll()}: {end}")

    def crash(self):
        """The server ends at once, and begins again with what is on the disk."""
        self.others.kill()
        self.others.wait(PATIENCE)
        self.server.send_signal(signal.SIGQUIT)
        self.server.wait(PATIENCE)
        self.session.close()
        for at, _, names in os.walk(DATA):
            for name in names:
                forget(os.path.join(at, name))
        self.start()
        self.others = self.clients()

    def step(self, count):
        self.alive()
        giver, taker = sorted(random.sample(range(self.ACCOUNTS), 2))
        amount, note = random.randint(-50, 50), os.urandom(random.randint(10, 1000)).hex()
        rows = self.session.ask(
            f"""
            BEGIN;
            UPDATE accounts SET balance = balance - {amount} WHERE id = {giver};
            UPDATE accounts SET balance = balance + {amount} WHERE id = {taker};
            INSERT INTO history VALUES ({count}, {giver}, {taker}, {amount}, '{note}');
            DELETE FROM history WHERE count <= {count} - {self.HISTORY};
            UPDATE counter SET count = count + 1 RETURNING count;
            COMMIT;
            """
        )
        same("the database's count, and memory's", rows, [str(count)])

    def check(self, count, crash):
        self.alive()
        if crash:
            self.crash()
        ask = self.session.ask
        same(f"count after step {count}", ask("SELECT count FROM counter;"), [str(count)])
        length = min(count, self.HISTORY)
        same(
            f"history after step {count}",
            ask("SELECT min(count), max(count), count(*) FROM history;"),
            [f"{count - length + 1}|{count}|{length}"],
        )
        # Of one instant, for others go on.
        same(
            f"sum of the accounts, of the others' transfers after step {count}",
            ask("SELECT (SELECT sum(balance) FROM accounts), (SELECT coalesce(sum(amount), 0) FROM others);"),
            [f"{self.ACCOUNTS * self.EACH}|0"],
        )
        for table in ["accounts", "history", "others", "counter"]:
            rows = ask(f"SELECT blkno, offnum, attnum, msg FROM verify_heapam('{table}');")
            same(f"damage of table {table} after step {count}", rows, [])
        for index in ["accounts_pkey", "history_pkey", "givers", "ids"]:
            rows = ask(f"SELECT bt_index_check('{index}', true);")
            same(f"damage of index {index} after step {count}", rows, [""])

        failures = ask("SELECT sum(checksum_failures) FROM pg_stat_database;")
        same(f"pages with a wrong checksum after step {count}", failures, ["0"])

    def facts(self):
        """How many lines the other clients have written."""
        return {"others": self.session.ask("SELECT count(*) FROM others;")[0]}
