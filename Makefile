# make serve [DIR=/path]: serve it. make test: everything the tests need, then all of them. make help tells the rest.

# Debian builds its own with profiles and across files, pyenv and others do not: a fifth of what a small request costs.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo /usr/bin/)python3
VENV   := .venv
BIN    := $(VENV)/bin
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT    := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get
# What make test wants from Debian: the kernel to test on and the clients to test with.
TOOLS  := linux.uml:user-mode-linux curl:curl openssl:openssl wget:wget aria2c:aria2 nginx:nginx-light gnutls-cli:gnutls-bin strace:strace rclone:rclone nghttp:nghttp2-client systemctl:systemd slowhttptest:slowhttptest
DIR    ?= .sample
LISTEN ?= localhost:8443
SHOWN  := $(patsubst :%,localhost:%,$(patsubst *:%,localhost:%,$(patsubst 0.0.0.0:%,localhost:%,$(LISTEN))))

.PHONY: help serve test lint bench figures install clean

help:
	@echo "make serve [DIR=/path] [LISTEN=HOST:PORT]  serve a directory at https://localhost:8443"
	@echo "make test                                  install what tests need and run all of them"
	@echo "make lint                                  ruff and mypy"
	@echo "make install [DESTDIR=]                    /opt/ktlsd and systemd units; docs/operations.md goes on from there"
	@echo "make bench                                 ktlsd bench, and what a GB costs; against SSLSocket.sendall and nginx"
	@echo "make figures                               the tables and pictures of docs/performance.md, measured anew"

serve: $(VENV)/.installed certs/localhost.pem $(if $(filter .sample,$(DIR)),.sample/SHA256SUMS)
	@[ -d "$(DIR)" ] || { echo "make serve: DIR=$(DIR) is no directory" >&2; exit 2; }
	@echo "To download:  curl --cacert $(CURDIR)/certs/ca.pem -O https://$(SHOWN)/$(if $(filter .sample,$(DIR)),big,FILE)"
	@exec $(BIN)/ktlsd serve "$(DIR)" --listen "$(LISTEN)" --cert certs/localhost.pem --key certs/localhost.key

test: $(VENV)/.installed-test tools
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ways of sending, both modes, nginx beside; then what a GB costs here, against SSLSocket.sendall, and HTTP/2 by streams.
bench: $(VENV)/.installed-test tools
	$(BIN)/ktlsd bench --against nginx
	$(BIN)/python tests/measure.py cost
	$(BIN)/python tests/measure.py sendall
	$(BIN)/python tests/measure.py http2
	$(BIN)/python tests/measure_small.py

# The tables and pictures of docs/performance.md: on this machine, on Debian's 6.1, and on the lab's kernel if that is there.
FIGURES := docs/figures
ALL := --protocol raw --protocol http/1.1 --protocol h2 --against nginx
LAB := ../shared/lab
figures: $(VENV)/.installed-test tools
	@mkdir -p $(FIGURES)
	$(BIN)/ktlsd bench $(ALL) --json $(FIGURES)/host.json --png $(FIGURES)/host.png
	$(BIN)/python tests/kernel/uml.py --kernel /usr/bin/linux.uml --mem 3G --timeout 1500 --out $(FIGURES) -- \
	  sh -c '$(BIN)/ktlsd bench --protocol raw --protocol http/1.1 --against nginx --size 16m --rounds 3 --json $$KTLSD_UML_OUT/debian-6.1.json'
	[ ! -x $(LAB)/run ] || $(LAB)/run --mem 4G --timeout 1500 --out $(FIGURES) -- \
	  sh -c '$(BIN)/ktlsd bench $(ALL) --json $$LAB_OUT/lab-7.2.json --png $$LAB_OUT/lab-7.2.png'
	$(BIN)/python docs/figures.py

# A program of its own in /opt/ktlsd, units, the kernel module at boot. Nothing that is there is overwritten but program and units.
UNITS := $(DESTDIR)/etc/systemd/system
install: | $(VENV)/bin/pip
	@[ "$$(id -u)" = 0 ] || [ -n "$(DESTDIR)" ] || { echo "make install writes to /opt and /etc: run it as root" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys; sys.exit(os.path.realpath(sys.executable).startswith(("/root/", "/home/")))' || \
	  { echo "this Python is in somebody's home, where the service can't read it: make install PYTHON=/usr/bin/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(DESTDIR)/opt/ktlsd
	$(DESTDIR)/opt/ktlsd/bin/pip install -q --disable-pip-version-check .
	install -d $(UNITS)/ktlsd.service.d $(DESTDIR)/etc/modules-load.d $(DESTDIR)/etc/ktlsd $(DESTDIR)/srv/files
	install -m 0644 systemd/ktlsd.service systemd/ktlsd.socket systemd/ktlsd-http.socket systemd/ktlsd-metrics.socket $(UNITS)/
	install -m 0644 systemd/ktlsd.service.d/10-socket.conf $(UNITS)/ktlsd.service.d/
	install -m 0644 systemd/modules-load.d/ktlsd.conf $(DESTDIR)/etc/modules-load.d/
	[ -e $(DESTDIR)/etc/ktlsd/ktlsd.toml ] || install -m 0644 systemd/ktlsd.toml $(DESTDIR)/etc/ktlsd/
	@rm -rf build
	@# What was made for a package must not name the place it was made in.
	@[ -z "$(DESTDIR)" ] || find $(DESTDIR)/opt/ktlsd/bin $(DESTDIR)/opt/ktlsd/pyvenv.cfg -type f -exec sed -i "s|$(DESTDIR)/opt|/opt|g" {} +
	@[ -n "$(DESTDIR)" ] || ln -sf /opt/ktlsd/bin/ktlsd /usr/local/bin/ktlsd
	@echo "Installed. Next: certificate and key into /etc/ktlsd, then systemctl daemon-reload (docs/operations.md)"

clean:
	rm -rf $(VENV) build .sample .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# --- what they stand on ---

# Debian splits venv off python3: get it where it is missing. A broken half of a .venv is made anew.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ktlsd needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(APT) update -qq && $(APT) install -y -qq python3-venv; }
	@rm -rf $(VENV); $(PYTHON) -m venv $(VENV)

# Or every start compiles it, where Python may not write.
COMPILED := $(BIN)/python -m compileall -q ktlsd

# Found by a path, not by a finder that every start would have to import first.
PIP := $(BIN)/pip install -q --disable-pip-version-check --config-settings editable_mode=compat

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	@echo "installing into $(VENV), once"
	$(PIP) -e .
	@$(COMPILED)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[test]'
	@$(COMPILED)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[lint,test]'
	@$(COMPILED)
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

.PHONY: tools
# nginx is wanted as a program to compare with: a policy for the time of the installation keeps it from being started.
tools:
	@missing=; for pair in $(TOOLS); do PATH=$$PATH:/usr/sbin command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; $(APT) update -qq; \
	  policy=/usr/sbin/policy-rc.d; ours=; \
	  [ -e $$policy ] || { ours=1; printf '#!/bin/sh\nexit 101\n' | $(SUDO) tee $$policy >/dev/null; $(SUDO) chmod +x $$policy; }; \
	  $(APT) install -y -qq $$missing; done=$$?; [ -z "$$ours" ] || $(SUDO) rm -f $$policy; exit $$done; fi

certs/localhost.pem: | $(VENV)/.installed
	@$(BIN)/python certs/make.py

# Something to look at and something to download, for those who only want to try.
.sample/SHA256SUMS:
	@mkdir -p .sample/docs
	@head -c 268435456 /dev/urandom > .sample/big
	@printf '<!doctype html><title>ktlsd</title><h1>It works</h1><p><a href="../big">256 MiB of noise</a></p>\n' > .sample/docs/index.html
	@cd .sample && sha256sum big > SHA256SUMS
